package plain

import "strings"

// keywords may stand before a parenthesis without calling a function: most can be the name of none, and
// the others stand before one in clauses (OVER (…), GROUP BY CUBE (…)). Types are those with a modifier.
var keywords = set(`
	all and any array as between by case cast coalesce cube distinct else except exists extract filter from
	greatest group grouping having ilike in intersect join lateral least like limit materialized not nullif
	offset on or over overlay position rollup row select sets some substring symmetric then to trim union
	using values varying when where

	bit char character dec decimal float interval numeric time timestamp varchar`)

// functions are PostgreSQL's own that keep no state in the session. Those of them that are volatile are
// listed once more in the test, which compares all with a server.
var functions = set(`
	array_agg avg bit_and bit_or bit_xor bool_and bool_or corr count covar_pop covar_samp every json_agg
	json_object_agg jsonb_agg jsonb_object_agg max min mode percentile_cont percentile_disc range_agg
	range_intersect_agg regr_avgx regr_avgy regr_count regr_intercept regr_r2 regr_slope regr_sxx regr_sxy
	regr_syy stddev stddev_pop stddev_samp string_agg sum var_pop var_samp variance

	cume_dist dense_rank first_value lag last_value lead nth_value ntile percent_rank rank row_number

	array_to_json json_array_elements json_array_elements_text json_array_length json_build_array
	json_build_object json_each json_each_text json_extract_path json_extract_path_text json_object
	json_object_keys json_populate_record json_populate_recordset json_strip_nulls json_to_record
	json_to_recordset json_typeof jsonb_array_elements jsonb_array_elements_text jsonb_array_length
	jsonb_build_array jsonb_build_object jsonb_each jsonb_each_text jsonb_extract_path
	jsonb_extract_path_text jsonb_insert jsonb_object jsonb_object_keys jsonb_path_exists
	jsonb_path_exists_tz jsonb_path_match jsonb_path_match_tz jsonb_path_query jsonb_path_query_array
	jsonb_path_query_array_tz jsonb_path_query_first jsonb_path_query_first_tz jsonb_path_query_tz
	jsonb_populate_record jsonb_populate_recordset jsonb_pretty jsonb_set jsonb_set_lax jsonb_strip_nulls
	jsonb_to_record jsonb_to_recordset jsonb_typeof row_to_json to_json to_jsonb

	ascii bit_count bit_length btrim char_length character_length chr concat concat_ws convert convert_from
	convert_to decode encode format get_bit get_byte initcap left length lower lpad ltrim md5 normalize
	octet_length parse_ident quote_ident quote_literal quote_nullable regexp_match regexp_matches
	regexp_replace regexp_split_to_array regexp_split_to_table repeat replace reverse right rpad rtrim
	set_bit set_byte sha224 sha256 sha384 sha512 split_part starts_with string_to_array string_to_table
	strpos substr to_ascii to_hex translate unistr upper

	abs acos acosd acosh asin asind asinh atan atan2 atan2d atand atanh cbrt ceil ceiling cos cosd cosh cot
	cotd degrees div exp factorial floor gcd lcm ln log log10 min_scale mod pi pow power radians random round
	scale sign sin sind sinh sqrt tan tand tanh trim_scale trunc width_bucket

	age clock_timestamp date date_bin date_part date_trunc isfinite justify_days justify_hours
	justify_interval make_date make_interval make_time make_timestamp make_timestamptz now overlaps
	statement_timestamp timeofday timestamptz timezone to_char to_date to_number to_timestamp
	transaction_timestamp

	array_to_tsvector json_to_tsvector jsonb_to_tsvector numnode phraseto_tsquery plainto_tsquery querytree
	setweight strip to_tsquery to_tsvector ts_delete ts_filter ts_headline ts_rank ts_rank_cd tsquery_phrase
	tsvector_to_array websearch_to_tsquery

	array_append array_cat array_dims array_fill array_length array_lower array_ndims array_position
	array_positions array_prepend array_remove array_replace array_to_string array_upper cardinality
	generate_series generate_subscripts trim_array unnest

	daterange int4range int8range isempty lower_inc lower_inf multirange numrange range_merge tsrange
	tstzrange upper_inc upper_inf

	area box center circle diameter height host hostmask lseg masklen netmask network point polygon radius
	width

	current_database current_schema current_setting gen_random_uuid num_nonnulls num_nulls pg_column_size
	pg_typeof version`)

func set(words string) map[string]bool {
	m := map[string]bool{}
	for word := range strings.FieldsSeq(words) {
		m[word] = true
	}
	return m
}

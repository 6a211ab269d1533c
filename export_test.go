package tenancy

import "context"

// SourceForTest is DataSource with the password, which no exported method gives.
func (c *Catalog) SourceForTest(ctx context.Context, id ID) (DataSource, error) {
	p, err := c.place(ctx, id)
	if err != nil {
		return DataSource{}, err
	}
	return p.source, nil
}

// CheckCron is parseCron without the schedule.
func CheckCron(spec string) error {
	_, err := parseCron(spec)
	return err
}

// SchemaLockForTest is the advisory lock that a migration of the schema takes.
func SchemaLockForTest(schema string) int64 { return schemaLock{schema}.id() }

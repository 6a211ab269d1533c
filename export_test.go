package tenancy

import (
	"context"
	"time"
)

// SourceForTest is DataSource with the password, which no exported method gives.
func (c *Catalog) SourceForTest(ctx context.Context, id ID) (DataSource, error) {
	p, err := c.place(ctx, id)
	if err != nil {
		return DataSource{}, err
	}
	return p.source, nil
}

// SchemaLockForTest is the advisory lock that a migration of the schema takes.
func SchemaLockForTest(schema string) int64 { return schemaLock{schema}.id() }

// NextOfCron is when the schedule fires first after now; the zero time when the specification is refused.
func NextOfCron(spec string, now time.Time) (time.Time, error) {
	s, err := parseCron(spec)
	if err != nil {
		return time.Time{}, err
	}
	return s.Next(now), nil
}

package tenancy

import (
	"crypto/x509"

	"github.com/jackc/pgx/v5"
)

// ConnConfig is connConfig.
func (d DataSource) ConnConfig() (*pgx.ConnConfig, error) { return d.connConfig() }

// Validate is validate.
func (d DataSource) Validate() error { return d.validate() }

// WithoutEnvironment is withoutEnvironment.
var WithoutEnvironment = withoutEnvironment

// VerifyChain is verifyChain.
func VerifyChain(roots *x509.CertPool) any { return verifyChain(roots) }

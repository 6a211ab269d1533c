package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"net/http"
	"strconv"
	"strings"

	"github.com/msmt-go/tenancy"
	"github.com/msmt-go/tenancy/examples/internal/demo"
)

// apiKeys stands in for a table of the service's own: for which tenant a key was issued. It can keep the tenants' IDs, which are never
// used again. Of a key it holds the hash alone. It is filled before the first request.
type apiKeys map[tenancy.UserKey]tenancy.ID

// keyUser is what the user keys of API keys begin with, and nobody else's.
const keyUser = "key|"

func userOfKey(secret string) tenancy.UserKey {
	sum := sha256.Sum256([]byte(secret))
	return tenancy.UserKey(keyUser + hex.EncodeToString(sum[:]))
}

// caller is the service's authentication: a name and password, or an API key. Both at once are an error.
func (k apiKeys) caller(r *http.Request) (tenancy.UserKey, error) {
	user, err := demo.BasicAuth(r)
	if err != nil || strings.HasPrefix(string(user), keyUser) {
		return "", errors.Join(err, errors.New("not a person's name and password"))
	}
	secrets := r.Header.Values("X-Api-Key")
	if len(secrets) == 0 {
		return user, nil
	}
	key := userOfKey(secrets[0])
	if _, issued := k[key]; !issued || len(secrets) > 1 || user != "" {
		return "", errors.New("not one known API key and nothing else")
	}
	return key, nil
}

// wrap is Config.WrapResolver. What it returns is called for every request, and answers from memory.
func (k apiKeys) wrap(next tenancy.TenantResolver) tenancy.TenantResolver {
	return tenancy.TenantResolverFunc(func(ctx context.Context, q tenancy.Query) (tenancy.Resolution, error) {
		if !strings.HasPrefix(string(q.User), keyUser) {
			return next.ResolveTenant(ctx, q)
		}
		id, issued := k[q.User]
		if !issued {
			return tenancy.Resolution{}, tenancy.ErrForbidden
		}
		// The key says which tenant it is, so a request that names one beside it is refused: whose a name or a domain is, only next
		// knows. The ID is what Tenancy.Check asks with.
		for _, h := range q.Hints {
			if h.Value != "" && (h.By != tenancy.ByID || h.Value != strconv.FormatInt(int64(id), 10)) {
				return tenancy.Resolution{}, tenancy.ErrForbidden
			}
		}
		return tenancy.Resolution{Tenant: id, Role: tenancy.RoleMember, Source: "API key"}, nil
	})
}

package tenancycmd

import (
	"context"

	"github.com/msmt-go/tenancy"
	"github.com/spf13/cobra"
)

func (a *app) rotateCommand() *cobra.Command {
	password := a.verb("password", "Give a tenant a new login with a new password", "has a new login", func(ctx context.Context, c *tenancy.Catalog, id tenancy.ID) error { return c.RotatePassword(ctx, id) })
	keys := &cobra.Command{Use: "keys", Short: "Seal everything in the primary under the first key of TENANCY_KEYS", Args: cobra.NoArgs,
		Long: "Seal again, under the first key of TENANCY_KEYS, all that an older one has sealed. When it says 0 the older keys can go. Every node must have been given the new key before.",
		RunE: a.runs(func(ctx context.Context, s *session, _ []string) error {
			sealed, err := s.c.RotateKeys(ctx)
			if err != nil {
				return err
			}
			return a.print(struct {
				Sealed int `json:"sealed"`
			}{sealed}, "%d records were sealed anew", sealed)
		})}
	dense := &cobra.Command{Use: "dense [SERVER]", Short: "Give the pools that tenants of a server share new logins", Args: cobra.MaximumNArgs(1), ValidArgsFunction: cobra.NoFileCompletions,
		RunE: a.runs(func(ctx context.Context, s *session, args []string) error {
			server := "main"
			if len(args) > 0 {
				server = args[0]
			}
			if err := s.c.RotateDense(ctx, server); err != nil {
				return err
			}
			return a.print(struct {
				Server string `json:"server"`
			}{server}, "the shared pools of server %s have new logins", clean(server))
		})}
	return group("rotate", "New passwords and keys", password, keys, dense)
}

package tenancy

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/msmt-go/tenancy/internal/ident"
	"github.com/msmt-go/tenancy/internal/scram"
)

// ownerLease is how long a password of an owner is valid; it is renewed while the run lasts.
const ownerLease = 10 * time.Minute

// asOwner lends fn a login as the place's owner. The password is made for this run: it expires
// by itself when the run dies, and is taken back when the run ends.
func (c *Catalog) asOwner(ctx context.Context, provisioner *pgx.Conn, p *place, fn func(ctx context.Context, cc *pgx.ConnConfig) error) (err error) {
	password, err := scram.Password()
	if err != nil {
		return err
	}
	verifier, err := scram.RandomVerifier(password)
	if err != nil {
		return err
	}
	owner := ident.Quote(p.owner)
	lend := func(ctx context.Context, rights string) error {
		var until string
		if err := provisioner.QueryRow(ctx, `SELECT (now() + $1::interval)::text`, ownerLease.String()).Scan(&until); err != nil {
			return err
		}
		return execDDL(ctx, provisioner, "ALTER ROLE "+owner+rights+" VALID UNTIL "+ident.Literal(until))
	}
	back := func(ctx context.Context) error {
		ctx, done := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		defer done()
		return takeBack(ctx, provisioner, p)
	}
	if err := lend(ctx, " LOGIN PASSWORD "+ident.Literal(verifier)); err != nil {
		if ctx.Err() != nil || provisioner.IsClosed() { // the server may have done it
			err = errors.Join(err, back(ctx))
		}
		return err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	renewed := make(chan struct{})
	var opened *pgx.Conn // in the place of a provisioner's session that has ended; nil: none
	go func() {
		defer close(renewed)
		tick := time.NewTicker(ownerLease / 3)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
				err := lend(ctx, "")
				if err != nil && ctx.Err() == nil && provisioner.IsClosed() { // it had ended since: the migration goes on
					if fresh, e := p.provisionerConn(ctx); e == nil {
						opened, provisioner = fresh, fresh
						err = lend(ctx, "")
					}
				}
				if err != nil && ctx.Err() == nil {
					cancel(fmt.Errorf("renew the owner's password: %w", err))
				}
			}
		}
	}()
	defer func() {
		cancel(nil)
		<-renewed
		err = errors.Join(err, back(ctx))
		if opened != nil {
			closeConn(opened)
		}
	}()
	d := p.source
	d.User, d.Password = p.owner, Secret(password)
	cc, err := d.connConfig()
	if err != nil {
		return err
	}
	cc.RuntimeParams["search_path"] = searchPath(p.source.Schema, c.tn.cfg.Extensions, c.tn.cfg.ReferenceTables)
	cc.RuntimeParams["application_name"] = "tenancy migration"
	if err := p.setTablespace(ctx, provisioner, cc); err != nil {
		return err
	}
	c.tn.servers.single(cc)
	return fn(ctx, cc)
}

// setTablespace has what is made in a session of the owner's be in the place's tablespace. Where that is the database's own nothing is set, with which partitioned tables could
// not be made. provisioner is in the place's database, which has its tablespace itself where it is the tenant's own.
func (p *place) setTablespace(ctx context.Context, provisioner *pgx.Conn, cc *pgx.ConnConfig) error {
	if p.tablespace == "" || p.isolation == IsolationDatabase {
		return nil
	}
	var own bool
	if err := provisioner.QueryRow(ctx, `SELECT t.spcname = $1 FROM pg_database d JOIN pg_tablespace t ON t.oid = d.dattablespace WHERE d.datname = current_database()`, p.tablespace).Scan(&own); err != nil {
		return err
	}
	if !own {
		cc.RuntimeParams["default_tablespace"] = p.tablespace
	}
	return nil
}

// takeBack ends the owner's right to log in, and its sessions.
func takeBack(ctx context.Context, provisioner *pgx.Conn, p *place) error {
	if !provisioner.IsClosed() {
		if err := takeBackOn(ctx, provisioner, p); err == nil || !provisioner.IsClosed() {
			return err
		}
	}
	// A cancelled statement closed it, or it had ended while the owner was at work.
	fresh, err := p.provisionerConn(ctx)
	if err != nil {
		return fmt.Errorf("take back the owner's login (it expires by itself in %v): %w", ownerLease, err)
	}
	defer closeConn(fresh)
	return takeBackOn(ctx, fresh, p)
}

func takeBackOn(ctx context.Context, provisioner *pgx.Conn, p *place) error {
	if err := execDDL(ctx, provisioner, "ALTER ROLE "+ident.Quote(p.owner)+" NOLOGIN PASSWORD NULL"); err != nil {
		return fmt.Errorf("take back the owner's login: %w", err)
	}
	// Nobody but this process has known the password, so that nobody is on the way in: when none is seen, none is left.
	for end := time.Now().Add(ownersGoodbye); ; {
		var left bool
		if err := provisioner.QueryRow(ctx, `SELECT count(*) > 0 FROM pg_stat_activity WHERE usename = $1`, p.owner).Scan(&left); err != nil || !left {
			return err
		}
		if time.Now().After(end) {
			break
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(2 * time.Millisecond):
		}
	}
	done, err := p.act(ctx, provisioner, p.owner)
	if err != nil {
		return err
	}
	defer done()
	return endListed(ctx, provisioner, []string{p.owner}, 1)
}

// ownersGoodbye is how long sessions that were closed have to go by themselves, for which nobody has to be a member.
const ownersGoodbye = time.Second

// lendOwner is asOwner on the worker's session of the provisioner's, or on one that is opened for it.
func (c *Catalog) lendOwner(ctx context.Context, p *place, w *worker, fn func(ctx context.Context, cc *pgx.ConnConfig) error) error {
	conn, done, err := w.provisionerOf(ctx, p)
	if err != nil {
		return err
	}
	defer done()
	return c.asOwner(ctx, conn, p, fn)
}

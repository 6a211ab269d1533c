package tenancy

import (
	"context"
	"time"
)

// DoctorAt is Doctor on a node with that clock.
func (tn *Tenancy) DoctorAt(ctx context.Context, now func() time.Time) ([]Finding, error) {
	return tn.doctor(ctx, now)
}

// SettingsForTest are the findings at a server on host with these settings.
func SettingsForTest(tn *Tenancy, host string, settings map[string]string) (found []Finding) {
	d := &doctor{tn: tn}
	w := &ward{doctor: d, address: DataSource{Host: host, Database: "app"}, settings: map[string]setting{}}
	for name, value := range settings {
		w.settings[name] = setting{value, "configuration file"}
	}
	for _, look := range []func(context.Context, *ward) error{checkVersion, checkSettings, checkConnections} {
		_ = look(context.Background(), w)
	}
	for _, f := range d.found {
		found = append(found, f.Finding)
	}
	return found
}

// SealProvisionerForTest is a provisioner's login as the primary keeps it.
func (tn *Tenancy) SealProvisionerForTest(d DataSource) ([]byte, error) {
	return tn.primary.sealSource(UID(tn.realm.Value()), "provisioner", d)
}

package tenancy

import "context"

// RotationSteps is the number of steps of a rotation.
func RotationSteps(tn *Tenancy) int { return len(tn.catalog.rotation()) }

// RotateUpTo does the first steps of a RotatePassword and leaves it there, as a process does that is killed between two.
func RotateUpTo(ctx context.Context, tn *Tenancy, id ID, steps int) error {
	ctx, release, err := tn.primary.lockTenant(ctx, id)
	if err != nil {
		return err
	}
	defer release()
	p, err := tn.catalog.place(ctx, id)
	if err != nil {
		return err
	}
	for _, step := range tn.catalog.rotation()[:steps] {
		if err := step(ctx, p); err != nil {
			return err
		}
	}
	return nil
}

// RotateUnlocked is RotatePassword in a process that has lost its lock and does not know it yet. before is called ahead of each step.
func RotateUnlocked(ctx context.Context, tn *Tenancy, id ID, before func(step int)) error {
	p, err := tn.catalog.place(ctx, id)
	if err != nil {
		return err
	}
	for i, step := range tn.catalog.rotation() {
		before(i)
		if err := step(ctx, p); err != nil {
			return err
		}
	}
	return nil
}

//go:build linux || darwin

package pgembed_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/msmt-go/tenancy/internal/pgembed"
)

func TestExternalServerIsUsedAndLeftAlone(t *testing.T) {
	own := start(t, pgembed.Options{})
	t.Setenv("TENANCY_TEST_URL", own.URL())
	s, err := pgembed.Start(t.Context(), pgembed.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if !s.External() || s.URL() != own.URL() || s.PID() != 0 || s.Version() != own.Version() || s.Major() != own.Major() {
		t.Errorf("External %v, PID %d, Version %s, Major %d", s.External(), s.PID(), s.Version(), s.Major())
	}
	_, logErr := s.Log()
	for what, err := range map[string]error{"Log": logErr, "Kill": s.Kill(), "Restart": s.Restart(t.Context(), true)} {
		if !errors.Is(err, pgembed.ErrExternal) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if err := s.Stop(); err != nil {
		t.Error(err)
	}
	connect(t, own.URL())
}

func TestExternalServerMustAnswer(t *testing.T) {
	for name, url := range map[string]string{
		"nobody_listens": "postgres://someone:hunter2@127.0.0.1:1/postgres",
		"no_url":         "postgres://someone:hunter2@127.0.0.1:none/postgres",
	} {
		t.Run(name, func(t *testing.T) {
			t.Setenv("TENANCY_TEST_URL", url)
			_, err := pgembed.Start(t.Context(), pgembed.Options{})
			if err == nil || !strings.Contains(err.Error(), "TENANCY_TEST_URL") {
				t.Fatalf("error is %v", err)
			}
			if strings.Contains(err.Error(), "hunter2") {
				t.Errorf("the error holds the password: %v", err)
			}
		})
	}
}

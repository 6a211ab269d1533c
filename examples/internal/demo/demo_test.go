//go:build unix

package demo

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"github.com/msmt-go/tenancy"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// TestProgramServesUntilItsContextEnds runs what Main runs, and looks for what it leaves behind.
func TestProgramServesUntilItsContextEnds(t *testing.T) {
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var d *Demo
	newHandler := func(made *Demo) (http.Handler, error) {
		d = made
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "served") }), nil
	}
	out, told := io.Pipe()
	ended := make(chan error, 1)
	go func() {
		err := run(ctx, told, "127.0.0.1:0", tenancy.Config{}, newHandler, []string{"curl 127.0.0.1:{port}"})
		told.CloseWithError(err)
		ended <- err
	}()
	lines := bufio.NewScanner(out)
	lines.Scan()
	url, ok := strings.CutPrefix(lines.Text(), "listening on ")
	if !ok || url != d.URL {
		t.Fatalf("it printed %q", lines.Text())
	}
	for lines.Scan() && !strings.Contains(lines.Text(), "curl") {
	}
	if want := "  curl " + strings.TrimPrefix(url, "http://"); lines.Text() != want {
		t.Errorf("it printed %q, want %q", lines.Text(), want)
	}
	lines.Scan() // the last line
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	res, err := client.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(res.Body)
	res.Body.Close()
	if string(body) != "served" || err != nil {
		t.Errorf("got %q, %v", body, err)
	}
	stop()
	if err := <-ended; err != nil {
		t.Errorf("the program ended with %v", err)
	}
	if _, err := client.Get(url); err == nil {
		t.Error("it still answers")
	}
	if pid := d.server.PID(); pid != 0 {
		t.Errorf("its PostgreSQL still runs as process %d", pid)
	}
}

func TestTakenAddressIsToldBeforeAnythingIsMade(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	err = run(t.Context(), io.Discard, l.Addr().String(), tenancy.Config{}, nil, nil)
	if _, ok := errors.AsType[*net.OpError](err); !ok {
		t.Errorf("got %v", err)
	}
}

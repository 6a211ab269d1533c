package demo

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"

	tenantmw "github.com/msmt-go/tenancy/middleware"
)

// Get asks h as curl would, and tells the answer in one line: the status and the body; of a problem the title, and the tenants to choose among.
func Get(h http.Handler, url string, with ...func(*http.Request)) string {
	r := httptest.NewRequest(http.MethodGet, url, nil)
	for _, f := range with {
		f(r)
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	text := strings.TrimSpace(w.Body.String())
	var p tenantmw.Problem
	if w.Header().Get("Content-Type") == "application/problem+json" && json.Unmarshal(w.Body.Bytes(), &p) == nil {
		text = strings.TrimSpace(p.Title + " " + strings.Join(p.Tenants, ", "))
	}
	return fmt.Sprint(w.Code, " ", text)
}

// As sends the user's name and password.
func As(user string) func(*http.Request) {
	return func(r *http.Request) { r.SetBasicAuth(user, "demo") }
}

// Token sends a bearer token, one more where there is one already.
func Token(token string) func(*http.Request) { return Header("Authorization", "Bearer "+token) }

// Header sends a header, once more where it is there already.
func Header(name, value string) func(*http.Request) {
	return func(r *http.Request) { r.Header.Add(name, value) }
}

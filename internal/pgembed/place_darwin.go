package pgembed

// systemCache is root's cache, outside root's home.
const systemCache = "/Library/Caches"

// ramDisk returns "": macOS has none unless one is made.
func ramDisk() string { return "" }

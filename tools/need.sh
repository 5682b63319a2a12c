# Sourced by the scripts beside it. need COMMAND PACKAGE: stops, naming the package, without it.
need() {
  command -v "$1" >/dev/null && return
  echo "$1 is not here. On Debian and Ubuntu: apt-get install $2" >&2
  exit 2
}

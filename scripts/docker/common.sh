# Sourced by the scripts beside it: messages, dry runs, docker or podman.
# shellcheck shell=bash

die() { # code message...
  local code=$1
  shift
  printf 'error: %s\n' "$*" >&2
  exit "$code"
}

usage() { sed -n '2,/^[^#]/s/^#\( \|$\)//p' "$0"; } # the comment at the head of the calling script

# An option must be followed by its value.
need_value() { # "$@"
  [ $# -ge 2 ] || die 2 "$1 needs a value; see --help"
}

# Run a command; with DRY_RUN=1 print it instead, quoted so that it can be pasted.
run() {
  if [ "${DRY_RUN:-0}" = 1 ]; then
    local words
    printf -v words ' %q' "$@"
    printf '%s\n' "${words# }"
  else
    "$@"
  fi
}

# The container engine: what was asked for, else docker, else podman.
find_engine() { # wanted or empty
  local engine
  case $1 in '' | docker | podman) ;; *) die 2 "--engine must be docker or podman, not '$1'" ;; esac
  for engine in ${1:-docker podman}; do
    if command -v "$engine" >/dev/null; then
      printf '%s' "$engine"
      return
    fi
  done
  die 1 "${1:-neither docker nor podman} is ${1:+not }installed here"
}

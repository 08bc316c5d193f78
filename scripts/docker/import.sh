#!/usr/bin/env bash
# Turn an image into a squashfs file that Pyxis starts at once on every node (Enroot import).
#
#   scripts/docker/import.sh [--force | --if-missing] IMAGE FILE.sqsh
#
# IMAGE         nvcr.io/nvidia/pytorch:26.03-py3 or nvcr.io#nvidia/pytorch:26.03-py3: from a registry (as Enroot's docker://...)
#               dockerd://berth:0.1.0 or podman://berth:0.1.0: an image that this machine built
# FILE.sqsh     the file to make; its SHA-256 goes to FILE.sqsh.sha256
# --force       replace the file if it is there
# --if-missing  leave the file if it is there (several jobs may ask at once: the first one done wins)
# The file appears under its name only when it is complete. Enroot's ENROOT_CACHE_PATH, ENROOT_TEMP_PATH and credentials apply.
# DRY_RUN=1 prints the command instead.
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=/dev/null
. "$here/common.sh"

# Enroot parts the registry from the image by a #; people write a slash.
enroot_uri() { # image
  local first=${1%%/*}
  case $1 in
    docker://* | dockerd://* | podman://*) printf '%s' "$1" ;;
    *'#'*) printf 'docker://%s' "$1" ;;
    */*) case $first in
      *.* | *:* | localhost) printf 'docker://%s#%s' "$first" "${1#*/}" ;;
      *) printf 'docker://%s' "$1" ;;
    esac ;;
    *) printf 'docker://%s' "$1" ;;
  esac
}

sha256_of() { sha256sum <"$1" | cut -d ' ' -f 1; } # from standard input: given a name, sha256sum would escape it

# Write FILE.sha256 in the form `sha256sum --check` reads.
write_sum() { # sum
  printf '%s  %s\n' "$1" "$name" >"$temporary.sha256"
  mv -f -- "$temporary.sha256" "$file.sha256"
}

# Give the finished image its name. Without --force a file that came meanwhile stays: a link, unlike mv, never replaces one.
publish() {
  if [ "$mode" = force ]; then
    mv -f -- "$temporary" "$file"
  elif ln -- "$temporary" "$file" 2>/dev/null; then
    rm -f -- "$temporary"
  else
    [ ! -e "$file" ] || return 1
    mv -n -- "$temporary" "$file" # a file system without hard links
    [ ! -e "$temporary" ]
  fi
}

mode=""
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) usage && exit 0 ;;
    --force | --if-missing)
      [ -z "$mode" ] || [ "$mode" = "${1#--}" ] || die 2 "--force and --if-missing exclude one another"
      mode=${1#--} && shift
      ;;
    --) shift && break ;;
    -*) die 2 "unknown option '$1'; see --help" ;;
    *) break ;;
  esac
done
[ $# = 2 ] || die 2 "give an image and a file: import.sh IMAGE FILE.sqsh; see --help"
image=$1 file=$2
[ -n "$image" ] || die 2 "the image has no name"
case $file in
  *$'\n'*) die 2 "the file's name holds a line break" ;;
  *.sqsh) ;;
  *) die 2 "'$file' must end in .sqsh: Pyxis and Enroot tell a file from a registry by it" ;;
esac
case $file in /*) ;; *) file=$PWD/$file ;; esac # also keeps a name that starts with - from being an option
name=${file##*/}
host=$(uname -n)
temporary=${file%/*}/.$name.$host.$$.partial

if [ -e "$file" ] && [ "$mode" = "" ]; then
  die 1 "$file is there already; --force replaces it, --if-missing takes it as it is"
fi
if [ -e "$file" ] && [ "$mode" = if-missing ]; then
  [ "${DRY_RUN:-0}" = 1 ] || [ -e "$file.sha256" ] || write_sum "$(sha256_of "$file")"
  echo "$file is there already" >&2
  exit 0
fi
if [ "${DRY_RUN:-0}" != 1 ]; then
  command -v enroot >/dev/null || die 1 "enroot is not installed here; run this where it is (a compute node, perhaps)"
  mkdir -p -- "${file%/*}"
  for leftover in "${file%/*}/.$name.$host."*.partial; do # of an import that was killed on this machine
    owner=${leftover%.partial}
    owner=${owner##*.}
    if [ ! -d "/proc/$owner" ]; then rm -f -- "$leftover"; fi
  done
  trap 'rm -f -- "$temporary" "$temporary.sha256"' EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM
fi
run enroot import --output "$temporary" "$(enroot_uri "$image")" || die 1 "enroot could not import $image; its message stands above"
[ "${DRY_RUN:-0}" != 1 ] || exit 0
[ -s "$temporary" ] || die 1 "enroot made no file of $image"
sum=$(sha256_of "$temporary")
if publish; then
  write_sum "$sum"
  echo "$file, SHA-256 $sum" >&2
elif [ "$mode" = if-missing ]; then
  echo "$file was made by somebody else meanwhile" >&2
else
  die 1 "$file was made by somebody else meanwhile; --force replaces it"
fi

#!/usr/bin/env bash
# Build the image of the Dockerfile.
#
#   scripts/docker/build.sh [--tag berth:0.1.0] [--base nvcr.io/nvidia/pytorch:26.03-py3] [--engine docker] [-- further arguments of build]
#
# --tag     name and tag of the image; berth:<version> if not given
# --base    image to build on, with a tag or digest; what the Dockerfile says if not given
# --engine  docker or podman; what is installed if not given
# DRY_RUN=1 prints the command instead.
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
root=$(cd -- "$here/../.." && pwd)
# shellcheck source=/dev/null
. "$here/common.sh"

pinned() { # option image: with a tag that stays what it is
  local name=${2##*/}
  case $name in
    *@sha256:?*) ;;
    *:latest) die 2 "$1 '$2': the tag latest names another image tomorrow; give a version" ;;
    *:?*) ;;
    *) die 2 "$1 '$2' has no tag; give one, as in berth:0.1.0" ;;
  esac
}

tag="" base="" wanted=""
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) usage && exit 0 ;;
    --tag) need_value "$@" && tag=$2 && shift 2 ;;
    --base) need_value "$@" && base=$2 && shift 2 ;;
    --engine) need_value "$@" && wanted=$2 && shift 2 ;;
    --) shift && break ;;
    *) die 2 "unknown argument '$1'; see --help (arguments for the engine come after --)" ;;
  esac
done

engine=$(find_engine "$wanted")
version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' "$root/berth/__init__.py")
tag=${tag:-berth:$version}
pinned --tag "$tag"
command=("$engine" build --file "$root/Dockerfile" --tag "$tag")
if [ -n "$base" ]; then
  pinned --base "$base"
  command+=(--build-arg "FROM_IMAGE_NAME=$base")
fi
if revision=$(git -C "$root" describe --always --dirty --abbrev=40 --exclude '*' 2>/dev/null); then
  command+=(--build-arg "GIT_REVISION=$revision")
fi
run "${command[@]}" "$@" "$root"

#!/usr/bin/env bash
# Start the image on this machine, for a look around or a run on one node.
#
#   scripts/docker/launch.sh [options] [-- command...]                bash if no command is given
#
# --image   the image; berth:<version> if not given
# --gpus    all, none, or a list of numbers as in 0,1; all if not given
# --data    folder that becomes /workspace/bert/data/work
# --results folder that becomes /workspace/bert/results
# --mount   SOURCE:DESTINATION[:ro], any number of times; SOURCE may hold colons, DESTINATION none
# --shm     size of /dev/shm, which NCCL and the workers of the data reader use; 8g if not given
# --engine  docker or podman; what is installed if not given
# You are yourself inside: what is written to a mounted folder is yours. DRY_RUN=1 prints the command instead.
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
root=$(cd -- "$here/../.." && pwd)
# shellcheck source=/dev/null
. "$here/common.sh"

mounts=()
add_mount() { # option source destination [ro]; --mount takes comma-separated values, with CSV's quotes where a value has a comma or a quote
  local from
  [ -d "$2" ] || die 2 "$1: there is no folder '$2'"
  case $2$3 in *$'\n'*) die 2 "$1: a path with a line break cannot be mounted" ;; esac
  case $3 in /*) ;; *) die 2 "$1: '$3' must be an absolute path in the container" ;; esac
  from=$(cd -- "$2" && pwd)
  mounts+=(--mount "type=bind,$(csv "source=$from"),$(csv "target=$3")${4:+,readonly}")
}

csv() { # field
  case $1 in
    *[,\"]*) printf '"%s"' "${1//\"/\"\"}" ;;
    *) printf '%s' "$1" ;;
  esac
}

split_mount() { # SOURCE:DESTINATION[:ro]
  local rest=$1 mode=""
  case $rest in *:ro) mode=ro rest=${rest%:ro} ;; esac
  case $rest in ?*:?*) ;; *) die 2 "--mount '$1' must be SOURCE:DESTINATION[:ro]" ;; esac
  add_mount --mount "${rest%:*}" "${rest##*:}" "$mode"
}

image="" gpus=all shm=8g wanted=""
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) usage && exit 0 ;;
    --image) need_value "$@" && image=$2 && shift 2 ;;
    --gpus) need_value "$@" && gpus=$2 && shift 2 ;;
    --shm) need_value "$@" && shm=$2 && shift 2 ;;
    --engine) need_value "$@" && wanted=$2 && shift 2 ;;
    --data) need_value "$@" && add_mount "$1" "$2" /workspace/bert/data/work && shift 2 ;;
    --results) need_value "$@" && add_mount "$1" "$2" /workspace/bert/results && shift 2 ;;
    --mount) need_value "$@" && split_mount "$2" && shift 2 ;;
    --) shift && break ;;
    *) die 2 "unknown argument '$1'; see --help (the command comes after --)" ;;
  esac
done
case $gpus in
  all | none) ;;
  *[!0-9,]* | ,* | *, | *,,* | '') die 2 "--gpus must be all, none or a list of numbers as in 0,1, not '$gpus'" ;;
esac

engine=$(find_engine "$wanted")
version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' "$root/berth/__init__.py")
command=("$engine" run --rm --init --shm-size "$shm" --ulimit memlock=-1 --ulimit stack=67108864)
if [ -t 0 ] && [ -t 1 ]; then command+=(--interactive --tty); fi
if [ "$engine" = podman ]; then
  command+=(--userns keep-id)
  case $gpus in
    none) ;;
    all) command+=(--device nvidia.com/gpu=all) ;;
    *) for number in ${gpus//,/ }; do command+=(--device "nvidia.com/gpu=$number"); done ;;
  esac
else
  command+=(--user "$(id -u):$(id -g)")
  case $gpus in
    none) ;;
    all) command+=(--gpus all) ;;
    *) command+=(--gpus "\"device=$gpus\"") ;; # docker reads CSV: the quotes keep the list together
  esac
fi
[ $# -gt 0 ] || set -- bash
run "${command[@]}" ${mounts[@]+"${mounts[@]}"} "${image:-berth:$version}" "$@"

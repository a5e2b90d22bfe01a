#!/usr/bin/env bash
# Sets raylign up in .venv from the pinned list for this machine; a second call finds nothing to do.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
stamp=$venv/setup-stamp
log=$venv/setup.log
python=${PYTHON:-python3}
torch_cpu_index=https://download.pytorch.org/whl/cpu

usage() {
  cat <<'TEXT'
usage: deploy/setup.sh [--device auto|cpu|gpu] [--dry-run]
  --device   which pinned list to install; auto (default) takes gpu where an NVIDIA GPU answers, else cpu
  --dry-run  say what would be done and stop
environment: PYTHON, the interpreter to build .venv with (default python3)
TEXT
}

say() { printf 'setup: %s\n' "$*"; }
die() {
  printf 'setup: error: %s\n' "$*" >&2
  exit 1
}

find_device() {
  if compgen -G '/dev/nvidia[0-9]*' >/dev/null || nvidia-smi -L 2>/dev/null | grep -q '^GPU '; then
    echo gpu
  else
    echo cpu
  fi
}

check_python() {
  local facts system machine libc
  command -v "$python" >/dev/null || die "no interpreter '$python'. Install Python 3.11, 3.12 or 3.13, or name one: make setup PYTHON=python3.12"
  facts=$("$python" -c '
import platform, sys
libc, release = platform.libc_ver()
old = libc != "glibc" or tuple(map(int, release.split(".")[:2])) < (2, 28)
print(platform.python_version(), platform.system(), platform.machine(), "old" if old else "ok")') || die "'$python' does not run. Name one that does: make setup PYTHON=python3.12"
  read -r python_version system machine libc <<<"$facts"
  case $python_version in
    3.11.* | 3.12.* | 3.13.*) ;;
    *) die "'$python' is Python $python_version; the pinned packages need 3.11, 3.12 or 3.13. Name one: make setup PYTHON=python3.12" ;;
  esac
  [[ "$system $machine" == "Linux x86_64" ]] || die "this is $system $machine; the pinned packages are built for Linux x86_64. Use such a machine or container"
  [[ $libc == ok ]] || die "the C library is not glibc 2.28 or later, which the pinned packages need. Debian 10, Ubuntu 20.04, RHEL 8 or later have it"
}

stop_if_up_to_date() {
  if [[ -x $venv/bin/python && -e $stamp && $(<"$stamp") == "$identity"$'\n'"$digest" ]]; then
    say ".venv is up to date ($device, Python $python_version)"
    exit 0
  fi
}

check_machine() {
  local need_gib free_gib driver
  command -v c++ >/dev/null || command -v g++ >/dev/null || die "no C++ compiler; vLLM and PyTorch compile kernels with it. Debian, Ubuntu: apt install g++"
  "$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' ||
    die "Python.h is missing; PyTorch compiles kernels against it. Debian, Ubuntu: apt install python${python_version%.*}-dev"
  need_gib=8
  [[ $device == gpu ]] && need_gib=20
  free_gib=$(df -Pk "$root" | awk 'NR == 2 { print int($4 / 1048576) }')
  ((free_gib >= need_gib)) || [[ -e $stamp ]] || die "$free_gib GiB free under $root; the $device set-up needs $need_gib GiB. Free some or clone elsewhere"
  if [[ $device == gpu ]] && driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1) && [[ -n $driver ]]; then
    ((${driver%%.*} >= 580)) || die "the NVIDIA driver is $driver; CUDA 13 needs 580 or later. Update it, or set up for the CPU: make setup DEVICE=cpu"
  fi
}

make_venv() {
  if [[ -e $venv && ! -e $venv/pyvenv.cfg ]]; then
    die "$venv is not a finished virtual environment. Remove it: make clean"
  elif [[ -e $stamp && $(head -n 1 "$stamp") != "$identity" ]]; then
    say "this .venv was made for another device, Python or folder: making it anew"
    "$python" -m venv --clear "$venv"
  elif [[ ! -x $venv/bin/python ]]; then
    say "making .venv with Python $python_version"
    "$python" -m venv "$venv"
  fi
  printf '%s\nunfinished\n' "$identity" >"$stamp"
  : >"$log"
}

# Copies pip's output to the log and reports about every 15 s.
follow_pip() {
  local total=$1 began=$SECONDS said=$SECONDS seen=0 state='' line
  while true; do
    line=''
    if IFS= read -r -t 5 line; then
      printf '%s\n' "$line" >>"$log"
      case $line in
        Collecting* | Processing* | 'Requirement already'*) seen=$((seen + 1)) state="$seen of $total found" ;;
        'Building wheels'*) state="building from source" ;;
        'Installing collected'*) state="copying into .venv" ;;
      esac
    elif (($? <= 128)); then
      break
    fi
    if ((SECONDS - said >= 15)); then
      said=$SECONDS
      say "  $state, $((SECONDS - began)) s"
    fi
  done
}

# install LABEL COUNT PIP_ARGUMENTS...
install() {
  local label=$1 count=$2 began=$SECONDS
  shift 2
  say "$label"
  PYTHONUNBUFFERED=1 "$venv/bin/python" -m pip install --no-deps --no-build-isolation \
    --disable-pip-version-check --no-input --progress-bar off "$@" 2>&1 | follow_pip "$count" || return
  say "  done in $((SECONDS - began)) s"
}

stop_with_log() {
  tail -n 12 "$log" >&2
  die "pip could not install $1 (whole output: $log). Check the network and pip's index settings, then run it again: it goes on where it stopped"
}

# pin NAME: the line of the requirement file that pins this package.
pin() { grep "^$1==" "$requirements"; }

install_torch() {
  local torch
  torch=$(pin torch)
  if [[ $device == gpu ]]; then
    install "installing $torch" 1 "$torch" || stop_with_log "$torch"
    return
  fi
  # PyPI holds only CUDA builds; a local version such as +cpu can come from nowhere but a CPU index or mirror.
  install "installing $torch from this machine's package sources" 1 "$torch" ||
    install "not there; installing $torch from $torch_cpu_index" 1 --index-url "$torch_cpu_index" "$torch" ||
    stop_with_log "$torch"
}

install_all() {
  local wheels=$venv/setup-wheels.txt source count
  source=$(pin deepspeed)
  grep '^[^#]*==' "$requirements" | grep -vxF "$source" >"$wheels"
  count=$(wc -l <"$wheels")
  install_torch
  install "installing $count packages of deploy/${requirements##*/}" "$count" --only-binary :all: -r "$wheels" ||
    stop_with_log "deploy/${requirements##*/}"
  # Published as source only, and its build asks the installed torch what this machine has: so it comes last.
  install "building $source" 1 "$source" || stop_with_log "$source"
  install "installing raylign itself, editable" 1 -e "$root" || stop_with_log raylign
}

check_import() {
  DEVICE=$device "$venv/bin/python" -c '
import os, sys
import raylign, torch
if os.environ["DEVICE"] == "gpu" and torch.version.cuda is None:
    sys.exit("setup: error: torch %s is a build without CUDA: a CPU wheel among the package sources of pip came first. "
             "Take it out of find-links or extra-index-url, then: make clean setup" % torch.__version__)
print("setup: raylign and torch %s import" % torch.__version__)'
}

device=auto
dry_run=no
while (($#)); do
  case $1 in
    --device) device=${2:-} && shift ;;
    --dry-run) dry_run=yes ;;
    --help | -h) usage && exit 0 ;;
    *) usage >&2 && die "unknown argument '$1'" ;;
  esac
  shift || true
done
case $device in
  auto) device=$(find_device) ;;
  cpu | gpu) ;;
  *) die "--device is '$device'; it is auto, cpu or gpu" ;;
esac

requirements=$root/deploy/requirements-$device.txt
check_python
identity="$device $python_version $root"
digest=$(cat "$requirements" "$root/pyproject.toml" | sha256sum | cut -d ' ' -f 1)
stop_if_up_to_date
if [[ $dry_run == yes ]]; then
  say "would install deploy/${requirements##*/} into .venv with Python $python_version (device: $device)"
  exit 0
fi

# The lock is on this file, so that none is left behind; pip inherits it and keeps it should this script be killed.
exec 9<"${BASH_SOURCE[0]}"
if ! flock --nonblock 9; then
  say "another set-up is at work here; waiting for it"
  flock 9
  stop_if_up_to_date
fi
trap 'die "interrupted; run it again: it goes on where it stopped"' INT TERM

say "device $device, Python $python_version; this takes a few minutes the first time"
check_machine
make_venv
install_all
check_import
printf '%s\n%s\n' "$identity" "$digest" >"$stamp"
say "finished in $SECONDS s"

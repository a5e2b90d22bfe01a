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

# Copies an installer's output to the log and reports about every 15 s.
follow() {
  local total=$1 began=$SECONDS said=$SECONDS seen=0 state='' line
  while true; do
    line=''
    if IFS= read -r -t 5 line; then
      printf '%s\n' "$line" >>"$log"
      case $line in
        Collecting* | Processing* | 'Requirement already'*) seen=$((seen + 1)) state="$seen of $total found" ;;
        *Downloading\ *) state="downloading" ;;
        'Building wheels'* | *Building\ *) state="building from source" ;;
        'Installing collected'* | 'Prepared '*) state="copying into .venv" ;;
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

# install LABEL COUNT ARGUMENTS...; arguments and their meaning are the same in uv and pip.
install() {
  local label=$1 count=$2 began=$SECONDS installer
  shift 2
  say "$label"
  if [[ $use_uv == yes ]]; then
    installer=("$venv/bin/uv" pip install --python "$venv/bin/python" ${no_index:+--no-index})
  else
    installer=("$venv/bin/python" -m pip install --disable-pip-version-check --no-input --progress-bar off)
  fi
  PYTHONUNBUFFERED=1 "${installer[@]}" --no-deps --no-build-isolation "$@" 2>&1 | follow "$count" || return
  say "  done in $((SECONDS - began)) s"
}

# or_pip COMMAND...: the command, with pip should it fail with uv.
or_pip() {
  "$@" && return
  [[ $use_uv == yes ]] || return
  use_uv=no
  say "  uv could not (whole output: $log); pip goes on"
  "$@"
}

stop_with_log() {
  tail -n 12 "$log" >&2
  die "could not install $1 (whole output: $log). Check the network and pip's index settings, then run it again: it goes on where it stopped"
}

# pin NAME: the line of the list that pins this package, hashes and all, in a file of its own. Says the file's name.
pin() {
  grep "^$1==" "$requirements" >"$venv/setup-$1.txt"
  echo "$venv/setup-$1.txt"
}

version() { grep -o "^$1==[^ ]*" "$requirements"; }

# uv copies in seconds what takes pip minutes. It reads no settings of pip, so it gets them; its own, where set, win.
install_uv() {
  local setting
  use_uv=no
  if ! install "installing $(version uv)" 1 --require-hashes -r "$(pin uv)"; then
    say "  not to be had from this machine's package sources: pip installs the rest, which takes minutes longer"
    return
  fi
  while IFS= read -r setting; do
    export "${setting?}"
  done < <("$venv/bin/python" -m pip config list | "$venv/bin/python" "$root/deploy/pip_to_uv.py")
  use_uv=yes
}

install_torch() {
  local torch
  torch=$(version torch)
  if [[ $device == gpu ]]; then
    install "installing $torch" 1 --require-hashes -r "$(pin torch)"
    return
  fi
  # PyPI holds only CUDA builds; a local version such as +cpu can come from nowhere but a CPU index or mirror.
  install "installing $torch from this machine's package sources" 1 --require-hashes -r "$(pin torch)" ||
    install "not there; installing $torch from $torch_cpu_index" 1 --index-url "$torch_cpu_index" --require-hashes -r "$(pin torch)"
}

# load MODULES... [-- MODULES...]: imports them, which leaves their bytecode behind; those after -- once there is a line
# to read.
load() {
  "$venv/bin/python" -P -c '
import importlib, site, sys
for name in sys.argv[1:]:
    if name == "--":
        sys.stdin.readline() or sys.exit("not all is installed")
        importlib.invalidate_caches()
        for folder in site.getsitepackages():
            site.addsitedir(folder)  # for what was installed editable meanwhile
    else:
        importlib.import_module(name)' "$@"
}

# A GPU set-up can be made where no GPU is, for other machines; what fails to load there is said and no more.
failed_to_load() {
  tail -n 12 "$1" >&2
  [[ $device == gpu && $(find_device) == cpu ]] || die "what was installed does not import (whole output: $1)"
  say "warning: not everything imports, and no GPU answers here; see ${1} and try raylign doctor where one does"
}

# CUDA's compiler comes as a wheel, where PyTorch and DeepSpeed do not look for it. DeepSpeed compiles nothing when it is
# installed, but where it sees a GPU its build asks for that compiler, and ends where it finds none.
find_cuda() {
  local home
  [[ $device == gpu ]] || return 0
  export DS_IGNORE_CUDA_DETECTION=1
  home=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/nvidia/cu13
  if [[ -z ${CUDA_HOME:-} && -e $home/bin/nvcc ]] && ! command -v nvcc >/dev/null; then
    export CUDA_HOME=$home
  fi
}

install_all() {
  local wheels=$venv/setup-wheels.txt count
  grep '^[^#]*==' "$requirements" | grep -v -e '^uv==' -e '^deepspeed==' >"$wheels"
  count=$(wc -l <"$wheels")
  install_uv
  or_pip install_torch || stop_with_log "$(version torch)"
  or_pip install "installing $count packages of deploy/${requirements##*/}" "$count" \
    --only-binary :all: --require-hashes -r "$wheels" || stop_with_log "deploy/${requirements##*/}"
  find_cuda
  # While DeepSpeed is built the largest libraries are loaded; each of the two finds what the other has compiled.
  load ray mlflow trl >"$venv/setup-libraries.log" 2>&1 &
  libraries=$!
  exec {built}> >(load vllm.entrypoints.llm vllm.v1.engine.core -- deepspeed recipes.commands.cli actors.team >"$venv/setup-load.log" 2>&1)
  loading=$!
  # Published as source only, and its build asks the installed torch what this machine has: so it comes last and no
  # build of it for another torch is taken from a cache.
  or_pip install "building $(version deepspeed)" 1 --no-cache-dir --require-hashes -r "$(pin deepspeed)" ||
    stop_with_log "$(version deepspeed)"
  or_pip install "installing raylign itself, editable" 1 -e "$root" || stop_with_log raylign
}

check_import() {
  say "importing everything once"
  wait "$libraries" || failed_to_load "$venv/setup-libraries.log"
  echo 2>/dev/null >&"$built" || true  # it may have failed already, which the next line finds
  wait "$loading" || failed_to_load "$venv/setup-load.log"
  libraries='' loading=''
  say "raylign and $(version torch) import"
}

interrupted() {
  [[ -z $loading ]] || kill "$loading" "$libraries" 2>/dev/null || true
  die "interrupted; run it again: it goes on where it stopped"
}

device=auto
dry_run=no
use_uv=no
no_index=''
libraries=''
loading=''
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
trap interrupted INT TERM
trap '' PIPE
# Without bytecode every start of every process would compile the libraries again, and the build of DeepSpeed too.
unset PYTHONDONTWRITEBYTECODE

say "device $device, Python $python_version"
check_machine
make_venv
install_all
check_import
printf '%s\n%s\n' "$identity" "$digest" >"$stamp"
say "finished in $SECONDS s"

# What the scripts of this folder share; they source it.
# shellcheck shell=bash

# Print a command so that it could be pasted.
show() {
  local line
  printf -v line ' %q' "$@"
  printf '+%s\n' "$line"
}

# Print a command, and run it unless DRY_RUN=1.
run() {
  show "$@"
  if [[ ${DRY_RUN:-0} != 1 ]]; then "$@"; fi
}

# need NAME 'what it is': stop with a clear message where the variable is not set.
need() {
  if [[ -z ${!1:-} ]]; then
    printf 'error: set %s (%s); see launch/README.md\n' "$1" "$2" >&2
    exit 2
  fi
}

# have PROGRAM 'where it comes from': stop where a program is missing that would be run.
have() {
  if [[ ${DRY_RUN:-0} != 1 ]] && ! command -v "$1" >/dev/null; then
    printf 'error: %s is not on the PATH: %s\n' "$1" "$2" >&2
    exit 2
  fi
}

# The words of a command as one line for another shell.
quoted() {
  printf '%q ' "$@"
}

usage() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0" >&2
  exit 2
}

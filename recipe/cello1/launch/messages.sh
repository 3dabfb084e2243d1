# Sourced by the launchers: what they say, in which nothing is left that a terminal would obey. File names may hold it.
shown() { # text -> text, with ? for control characters and marks that turn the direction of text, in UTF-8
  local LC_ALL=C text=$1
  text=${text//[$'\1'-$'\37\177']/?}
  text=${text//$'\xc2'[$'\x80'-$'\x9f']/?}
  text=${text//$'\xd8\x9c'/?}
  text=${text//$'\xe2\x80'[$'\x8e\x8f\xa8'-$'\xae']/?}
  printf '%s' "${text//$'\xe2\x81'[$'\xa6'-$'\xa9']/?}"
}
fail() { printf 'error: %s\n' "$(shown "$1")" >&2; exit 2; }
stage() { printf '\n== %s\n' "$(shown "$1")" >&2; }

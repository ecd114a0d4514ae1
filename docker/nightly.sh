#!/usr/bin/env bash
#
# The nightly check of every profile that has a baseline, one after the other: a device is leased, so two checks never
# run at once, and while one runs this script sleeps. It retries nothing and lets no profile's failure stop the others.
# Needs bash 4.2, coreutils, `deploy` and the Python that deploy runs on. `nightly.sh --help` has the rest.
set -euo pipefail
shopt -u patsub_replacement 2>/dev/null || true # bash 5.2 reads & in a replacement otherwise

readonly GRACE_S=15 # from the polite end of a check to SIGKILL

usage() {
    cat <<'END'
Usage: nightly.sh [--project DIR] [--out DIR] [--profiles DIR] [--limit SECONDS]

  --project DIR     Folder that holds .deploy, with the baselines.  [here]
  --out DIR         Reports go to DIR/DATE/PROFILE/.  [PROJECT/runs/nightly]
  --profiles DIR    Where profiles of your own lie: NAME.toml in it is checked as --target DIR/NAME.toml.  [the files
                    that the baselines were accepted with]
  --limit SECONDS   A check that takes longer is ended, and is an error.  [3600]

`deploy` is taken from $DEPLOY, from PATH, or from .venv beside this script's folder, in this order.

Exit code: the worst of all checks. 1 a check broke, 2 it was asked wrongly; else 3 a check failed; else 4 a check was
not measured or left no verdict, or there is no baseline; else 0. After a signal: 128 and its number.
END
}

# --- what is said -----------------------------------------------------------------------------------------------------

die() { # CODE SENTENCE HINT
    printf 'Error: %s\n%s\n' "$2" "$3" >&2
    exit "$1"
}

xml() { # TEXT: fit for an XML attribute and for a cell of a Markdown table
    local text=${1//[[:cntrl:]]/ }
    text=${text//&/&amp;} text=${text//</&lt;} text=${text//>/&gt;} text=${text//\"/&quot;} text=${text//|/&#124;}
    printf '%s' "$text"
}

# A profile must not be missing from the JUnit report because its check died before it could write one.
write_junit() { # FILE PROFILE WORD CODE SECONDS SENTENCE
    local inner="" kind=error case
    [[ $4 != 3 ]] || kind=failure
    [[ $4 == 0 ]] || inner="<$kind type=\"$(xml "$3")\" message=\"$(xml "$6")\"/>"
    case="<testcase classname=\"deploy.check.$(xml "$2")\" name=\"check\" time=\"$5\">$inner</testcase>"
    printf '%s\n%s\n' '<?xml version="1.0" encoding="utf-8"?>' "<testsuite name=\"deploy check\">$case</testsuite>" >"$1"
}

annotate() { # PROFILE WORD CODE SENTENCE: shows on the page of a GitHub Actions run
    local level=error title=${1//%/%25} text=${4//%/%25}
    title=${title//:/%3A} title=${title//,/%2C}
    case $3:$2 in
        0:warn) level=warning ;;
        0:*) return ;;
        *) ;;
    esac
    printf '::%s title=nightly check of %s::%s: %s\n' "$level" "$title" "$2" "$text"
}

show_table() {
    local index width=7
    for index in "${!checked[@]}"; do
        ((${#checked[index]} <= width)) || width=${#checked[index]}
    done
    printf '\n%-*s  %-13s  %4s  %8s  %s\n' "$width" profile verdict exit seconds said
    for index in "${!checked[@]}"; do
        printf '%-*s  %-13s  %4s  %8s  %s\n' "$width" "${checked[index]}" "${words[index]}" "${codes[index]}" \
            "${times[index]}" "${said[index]}"
    done
    printf '%s\n' "$(count_up); reports in $folder"
}

markdown_table() {
    local index row
    printf '\n### Nightly check\n\n| profile | verdict | exit | seconds | said |\n|---|---|---|---|---|\n'
    for index in "${!checked[@]}"; do
        row="$(xml "${checked[index]}") | ${words[index]} | ${codes[index]} | ${times[index]} | $(xml "${said[index]}")"
        printf '| %s |\n' "$row"
    done
    printf '\n%s\n' "$(count_up)"
}

count_up() { # "3 profiles: 1 fail, 2 pass"
    local word text="" noun=profiles
    local -A count=()
    local -a order=()
    for word in "${words[@]}"; do
        [[ -n ${count[$word]:-} ]] || order+=("$word")
        count[$word]=$((${count[$word]:-0} + 1))
    done
    for word in "${order[@]}"; do
        text+="${text:+, }${count[$word]} $word"
    done
    ((${#words[@]} != 1)) || noun=profile
    printf '%s %s: %s' "${#words[@]}" "$noun" "$text"
}

# --- one check --------------------------------------------------------------------------------------------------------

running="" # process id of the check that runs, which leads its process group
stopped="" # the first signal that asked this script to end
signals=0

# shellcheck disable=SC2329 # the traps below call it
stop() { # SIGNAL: ends the running check by its process id; a second signal does not wait for it
    signals=$((signals + 1))
    if [[ -z $running ]]; then
        stopped=${stopped:-$1}
    elif [[ -z $stopped ]]; then
        stopped=$1
        kill -s INT "$running" 2>/dev/null || true
    else
        kill -s KILL -- "-$running" 2>/dev/null || true
    fi
}

leave_if_stopped() {
    case $stopped in
        HUP) exit 129 ;;
        INT) exit 130 ;;
        TERM) exit 143 ;;
        *) ;;
    esac
}

trap 'stop INT' INT
trap 'stop TERM' TERM
trap 'stop HUP' HUP

# Sets `code`. Job control gives the check a process group of its own from its first moment, and lets SIGINT through to
# it, so that Ctrl-C arrives here alone; `timeout` passes signals on, and follows each with SIGKILL after the grace.
run_check() { # TARGET FOLDER
    local before
    set -m
    timeout --signal=INT --kill-after="$GRACE_S" "$limit" "$deploy" check --target "$1" --junit "$2/junit.xml" \
        --markdown "$2/report.md" --html "$2/report.html" --json >"$2/check.json" 2>"$2/log" </dev/null &
    running=$!
    set +m
    [[ -z $stopped ]] || kill -s INT "$running" 2>/dev/null || true # it came between the fork and here
    while :; do
        before=$signals code=0
        wait "$running" 2>/dev/null || code=$?
        [[ $signals != "$before" ]] || break
    done
    running=""
}

# Verdict and sentence of a check, or of its error; two lines, empty where the file does not say.
readonly READ_VERDICT='
import json, sys
try:
    told = json.load(sys.stdin.buffer)
except ValueError:
    told = {}
told = told if isinstance(told, dict) else {}
said = (told.get("outcome", ""), told.get("reason", told.get("error", "")), "")
said = ("".join(sign if sign.isprintable() else " " for sign in str(part)) for part in said)
sys.stdout.buffer.write("\n".join(" ".join(part.split()) for part in said).encode("utf-8", "replace"))
'

# Sets `word` and `sentence`, and `code` where 0 came without a verdict that passes: not measured is never a pass.
judge() { # FOLDER
    local told
    mapfile -t told < <("$python" -I -S -c "$READ_VERDICT" <"$1/check.json")
    word=${told[0]:-} sentence=${told[1]:-}
    case $code:$word in
        0:pass | 0:warn | 0:improved | 4:undecided | 4:inconclusive) ;;
        0:*)
            sentence="it ended with 0, but its verdict is '${word:-missing}'.${sentence:+ $sentence}"
            word="not measured" code=4
            ;;
        3:*) word=fail ;;
        4:*) word="not measured" ;;
        2:*) word=mistake ;;
        124:*) word=error sentence="it was ended after the limit of $limit s." ;;
        *) word=error ;;
    esac
    if [[ -z $sentence && $code != 0 && -s $1/log ]]; then
        sentence=$(tail -n 1 -- "$1/log")
    fi
}

check() { # PROFILE
    local target=$1 begun=$SECONDS word="not run" sentence="ended by SIG$stopped before it." code=4 at
    if [[ -n $profiles && -f $profiles/$1.toml ]]; then
        target=$profiles/$1.toml
    elif [[ -f ${files[$1]} ]]; then
        target=${files[$1]}
    fi
    if ! fresh_folder "$folder/$(file_name "$1")"; then
        note "$1" error 1 0 "cannot make a folder for its reports in '$folder'."
        return
    fi
    at=$REPLY
    if [[ -z $stopped ]]; then
        printf '%s  %s ...\n' "$(date -u +%H:%M:%SZ)" "$1"
        run_check "$target" "$at"
        judge "$at"
        if [[ -n $stopped && $word =~ ^(error|mistake|not measured)$ ]]; then # else it was done before the signal
            word=interrupted sentence="ended by SIG$stopped."
        fi
    fi
    if [[ ! -s $at/junit.xml || $word == "not measured" || $word == interrupted ]]; then
        write_junit "$at/junit.xml" "$1" "$word" "$code" $((SECONDS - begun)) "$sentence" ||
            printf "cannot write '%s'.\n" "$at/junit.xml" >&2
    fi
    note "$1" "$word" "$code" $((SECONDS - begun)) "$sentence"
}

note() { # PROFILE WORD CODE SECONDS SENTENCE
    checked+=("$1") words+=("$2") codes+=("$3") times+=("$4") said+=("$5")
    [[ ${GITHUB_ACTIONS:-} != true ]] || annotate "$1" "$2" "$3" "$5"
}

# --- all of them ------------------------------------------------------------------------------------------------------

# A line each: name, tab, and the profile's own file, which the newest baseline was accepted with, where it has one.
readonly READ_PROFILES='
import json, sys
files = {pin["profile"]: pin.get("file") or "" for pin in json.load(sys.stdin.buffer)["baselines"]}
if not all(isinstance(name, str) and name.isprintable() and name for name in files):
    raise ValueError(files)
told = (f"{name}\t{file if file.isprintable() else str()}" for name, file in files.items())
sys.stdout.buffer.write("\n".join(told).encode())
'

file_name() { # NAME: without what a file system or a shell could misread
    local LC_ALL=C name
    name=${1//[^A-Za-z0-9._-]/_}
    printf '%s' "${name/#[.-]/_}"
}

fresh_folder() { # PATH: makes it, or PATH-2, PATH-3, ...; sets REPLY
    local number=2
    REPLY=$1
    until mkdir -- "$REPLY" 2>/dev/null; do
        [[ -e $REPLY ]] || return 1
        REPLY=$1-$((number++))
    done
}

find_programs() {
    local beside
    beside=$(dirname -- "${BASH_SOURCE[0]}")/../.venv/bin/deploy
    deploy=$(command -v -- "${DEPLOY:-deploy}" || true)
    if [[ -z $deploy && -z ${DEPLOY:-} && -x $beside ]]; then
        deploy=$beside
    fi
    [[ -n $deploy ]] || die 1 "there is no program '${DEPLOY:-deploy}'." "DEPLOY=/path/to/deploy nightly.sh"
    [[ $deploy == /* ]] || deploy=$PWD/$deploy
    python=${deploy%/*}/python3
    [[ -x $python ]] || python=$(command -v python3 || true)
    [[ -n $python ]] || die 1 "there is no Python beside '$deploy' and none on PATH." "put python3 on PATH."
}

list_baselines() { # sets `names` and `files`
    local listed line code=0
    "$deploy" baseline show --json >"$folder/baselines.json" </dev/null || code=$?
    leave_if_stopped
    case $code in
        0 | 4) ;;
        2) die 2 "'deploy baseline show --json' was refused." "see $folder/baselines.json" ;;
        *) die 1 "'deploy baseline show --json' ended with $code." "see $folder/baselines.json" ;;
    esac
    if [[ $code == 0 ]]; then
        listed=$("$python" -I -S -c "$READ_PROFILES" <"$folder/baselines.json" 2>/dev/null) ||
            die 1 "'deploy baseline show --json' lists no baselines that can be read." "see $folder/baselines.json"
    fi
    [[ -n ${listed:-} ]] || die 4 "no profile has a baseline in '$PWD/.deploy', so nothing was checked." \
        "deploy baseline accept RUN --target T, or nightly.sh --project DIR for the folder that holds .deploy"
    while IFS= read -r line; do
        names+=("${line%%$'\t'*}")
        files[${line%%$'\t'*}]=${line#*$'\t'}
    done <<<"$listed"
}

worst() { # the order of exit codes: broken, failed, not measured, passed
    local code worst=0
    for code in "${codes[@]}"; do
        case $worst:$code in
            *:0 | 1:* | 3:4) ;;
            2:[34]) ;;
            *:[234]) worst=$code ;;
            *) worst=1 ;;
        esac
    done
    printf '%s' "$worst"
}

parse() {
    project=$PWD out="" profiles="" limit=3600
    while (($# > 0)); do
        case $1 in
            -h | --help)
                usage
                exit 0
                ;;
            --project | --out | --profiles | --limit)
                (($# > 1)) || die 2 "$1 needs a value." "nightly.sh --help"
                [[ $1 == --limit || $2 == /* ]] || set -- "$1" "$PWD/$2" "${@:3}"
                printf -v "${1#--}" '%s' "$2"
                shift 2
                ;;
            *) die 2 "no option '$1'." "nightly.sh --help" ;;
        esac
    done
    [[ $limit =~ ^[1-9][0-9]*$ ]] || die 2 "--limit $limit is no whole number of seconds." "nightly.sh --limit 3600"
    [[ -d $project ]] || die 2 "there is no folder '$project'." "nightly.sh --project DIR"
    [[ -z $profiles || -d $profiles ]] || die 2 "there is no folder '$profiles'." "nightly.sh --profiles DIR"
    out=${out:-$project/runs/nightly}
}

main() {
    local name
    parse "$@"
    find_programs
    cd -- "$project"
    if ! mkdir -p -- "$out" 2>/dev/null || ! fresh_folder "$out/$(date -u +%F)"; then
        die 1 "cannot write reports into '$out'; nothing was checked." "make it writable, or nightly.sh --out DIR"
    fi
    folder=$REPLY
    list_baselines
    for name in "${names[@]}"; do
        check "$name"
    done
    show_table
    show_table >"$folder/summary.txt" || true
    if [[ -n ${GITHUB_STEP_SUMMARY:-} ]]; then
        markdown_table >>"$GITHUB_STEP_SUMMARY" || true
    fi
    leave_if_stopped
    exit "$(worst)"
}

checked=() words=() codes=() times=() said=() names=()
declare -A files=()
main "$@"

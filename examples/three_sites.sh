#!/usr/bin/env bash
# A server and three sites as processes of their own, over HTTPS with certificates on this machine; the same
# configuration in one process; and whether both end in the same adapters and ledgers, to the last bit.
#
#     examples/three_sites.sh [fedllm] [kd] [split] [labels-at-client]        default: all four
#
# Exit code 1 where they differ. FEDTRIO names the command, if it is not on the path. What is written goes to a
# temporary folder and is removed at the end; KEEP=folder keeps it there.
set -euo pipefail

FEDTRIO=$(command -v "${FEDTRIO:-fedtrio}") || { echo "no fedtrio on the path; activate its environment" >&2; exit 2; }
SITES="bank council factory"
ROWS=40 # of each site
export OMP_NUM_THREADS=1 LC_ALL=C.UTF-8 PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1 NO_PROXY=127.0.0.1 no_proxy=127.0.0.1

WORK=${KEEP:-$(mktemp -d)}
PIDS=""
clean_up() {
    for pid in $PIDS; do kill "$pid" 2>/dev/null || true; done
    wait 2>/dev/null || true
    [ -n "${KEEP:-}" ] || rm -rf "$WORK"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

data() { # a file for each site, and one with all of them, from the built-in data; the site is the last column
    local train=$1/train.csv
    head -n 1 "$train" >"$WORK/all.csv"
    for site in $SITES; do
        head -n 1 "$train" >"$WORK/$site.csv"
        awk -F, -v site="$site" -v rows=$ROWS '$NF == site && n++ < rows' "$train" |
            tee -a "$WORK/all.csv" >>"$WORK/$site.csv"
        printf 'data: {train: %s.csv}\nthreads: 1\n' "$site" >"$WORK/$site.yaml"
    done
    LABELS=$(awk -F, 'NR > 1 { print $(NF - 1) }' "$train" | sort -u | paste -sd, -)
}

configuration() { # name, frameworks, who has the labels in split: the same twice, but for where the data lie
    local public="test: $DEMO/test.csv, public: $DEMO/public.csv, max_test: 20, max_public: 16, labels: [$LABELS]"
    for where in here sites; do
        {
            printf 'model: nano\nrounds: 2\nthreads: 1\ntrain: {precision: fp32}\n'
            printf 'frameworks: [%s]\nsplit: {labels: %s}\n' "$2" "$3"
            if [ $where = here ]; then
                printf 'data: {train: all.csv, site: site, %s}\npartition: {name: column}\n' "$public"
            else
                printf 'data: {%s}\ndeadline: 300\n' "$public"
                printf 'wire: {sites: [%s], host: 127.0.0.1, port: 0}\n' "${SITES// /, }"
            fi
        } >"$WORK/$1-$where.yaml"
    done
}

show_logs() {
    for log in "$WORK"/"$1"-*.log; do echo "--- $log" >&2; tail -n 15 "$log" >&2; done
    exit 1
}

across() { # name: a server and three sites
    local port="" started=""
    "$FEDTRIO" serve "$WORK/$1-sites.yaml" --certs "$WORK/certs/server" --out "$WORK/$1-sites" \
        >"$WORK/$1-server.log" 2>&1 &
    local server=$!
    PIDS="$PIDS $server"
    for _ in $(seq 1200); do
        port=$(sed -n 's/^waiting on port \([0-9]*\) .*/\1/p' "$WORK/$1-server.log")
        [ -n "$port" ] && break
        kill -0 $server 2>/dev/null || show_logs "$1"
        sleep 0.1
    done
    [ -n "$port" ] || show_logs "$1"
    for site in $SITES; do
        "$FEDTRIO" site "$WORK/$site.yaml" --server "https://127.0.0.1:$port" --certs "$WORK/certs/$site" \
            --folder "$WORK/$1-memory-$site" --patience 300 >"$WORK/$1-$site.log" 2>&1 &
        started="$started $!"
    done
    PIDS="$PIDS $started"
    for pid in $server $started; do wait "$pid" || show_logs "$1"; done
}

sum() { # the first 16 digits of a file's SHA-256
    "$PYTHON" -c "import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], 'rb').read()).hexdigest()[:16])" "$1"
}

compare() { # name, framework, shown as
    local adapters="" ledgers="" verdict="the same"
    for where in here sites; do
        adapters="$adapters $(sum "$WORK/$1-$where/$2-0/adapter/adapter_model.safetensors")"
        ledgers="$ledgers $(sum "$WORK/$1-$where/$2-0/ledger.jsonl")"
    done
    # shellcheck disable=SC2086
    set -- "$3" $adapters $ledgers
    [ "$2" = "$3" ] && [ "$4" = "$5" ] || { verdict="DIFFERENT: $3, $5"; DIFFERENT=1; }
    printf '%-18s %-18s %-18s %s\n' "$1" "$2" "$4" "$verdict"
}

CASES=${*:-fedllm kd split labels-at-client}
SERVER_LABELS="" CLIENT_LABELS=""
for case in $CASES; do
    case $case in
    fedllm | kd | split) SERVER_LABELS="$SERVER_LABELS${SERVER_LABELS:+, }$case" ;;
    labels-at-client) CLIENT_LABELS=split ;;
    *) echo "$case is none of fedllm, kd, split, labels-at-client" >&2 && exit 2 ;;
    esac
done

mkdir -p "$WORK"
PYTHON=$(dirname "$FEDTRIO")/python
DEMO=$("$PYTHON" -c 'import fedtrio, pathlib; print(pathlib.Path(fedtrio.__file__).parent / "data" / "demo")')
data "$DEMO"
# shellcheck disable=SC2086
"$FEDTRIO" certs $SITES --out "$WORK/certs" >/dev/null

DIFFERENT=0
[ -z "$SERVER_LABELS" ] || configuration together "$SERVER_LABELS" server
[ -z "$CLIENT_LABELS" ] || configuration client "$CLIENT_LABELS" client
printf '%-18s %-18s %-18s %s\n' "" "adapter (SHA-256)" "ledger (SHA-256)" "three sites over HTTPS, and one process"
for name in together client; do
    [ -f "$WORK/$name-here.yaml" ] || continue
    "$FEDTRIO" compare "$WORK/$name-here.yaml" --out "$WORK/$name-here" --jobs 1 >"$WORK/$name-here.log" 2>&1 &
    alone=$!
    PIDS="$PIDS $alone"
    across $name
    wait $alone || show_logs $name
    if [ $name = client ]; then
        compare client split "split, U-shape"
    else
        for framework in ${SERVER_LABELS//,/}; do compare together "$framework" "$framework"; done
    fi
done
exit $DIFFERENT

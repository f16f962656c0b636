#!/usr/bin/env bash
# Holds a live server against openapi/openapi.yaml with schemathesis: what may be sent is, and what comes back must be
# what the description says. Servers are private, end with this script, and are ended by their own ids.
# usage: run.sh ONCEBOX [schemathesis arguments]; PYTHON names the interpreter.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)

version=4.32.5
# The time for fuzzing; examples and edge cases of each operation come first and take about as long.
seconds=${SCHEMATHESIS_SECONDS:-90}
oncebox=$(cd "$(dirname "$1")" && pwd -P)/$(basename "$1")
shift
venv=${CARGO_TARGET_DIR:-$root/target}/schemathesis

if [ "$("$venv/bin/schemathesis" --version 2>/dev/null)" != "schemathesis, version $version" ]; then
    "${PYTHON:-python3}" -m venv --clear "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check --retries 5 "schemathesis==$version"
fi

dir=$(mktemp -d)
nodes='' server=''
finish() {
    trap - EXIT INT TERM HUP
    if [ -n "$server" ]; then
        kill "$server" 2>/dev/null || true
        wait "$server" 2>/dev/null || true
    fi
    # The nodes end with their input, and take their data along.
    if [ -n "$nodes" ]; then
        exec 8>&-
        wait "$nodes" 2>/dev/null || true
    fi
    rm -rf "$dir"
}
trap finish EXIT
trap 'exit 130' INT TERM HUP

mkfifo "$dir/hold" "$dir/ready"
"$oncebox" node hold --dir "$dir/nodes" <"$dir/hold" >"$dir/ready" 2>"$dir/nodes.log" &
nodes=$!
exec 8>"$dir/hold"
ready=''
read -r -t 120 ready <"$dir/ready" || true
if [ "$ready" != ready ]; then
    cat "$dir/nodes.log" >&2
    exit 1
fi
eval "$("$oncebox" node env --dir "$dir/nodes")"
unset ONCEBOX_CONFIG ONCEBOX_LISTEN
"$oncebox" migrate >/dev/null
for file in "$root"/tests/schemathesis/*.sql; do
    "$oncebox" node psql --dir "$dir/nodes" -- --quiet --no-psqlrc --set ON_ERROR_STOP=1 --file - <"$file" >/dev/null
done

token=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
port=$("$venv/bin/python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
# The server must not hold the nodes' input open.
ONCEBOX_API_TOKEN=$token ONCEBOX_LOG=warn "$oncebox" serve --listen "127.0.0.1:$port" >"$dir/serve.log" 2>&1 8>&- &
server=$!
ready=''
for _ in $(seq 300); do
    if (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
        ready=yes
        break
    fi
    kill -0 "$server" 2>/dev/null || break
    sleep 0.2
done
if [ -z "$ready" ]; then
    cat "$dir/serve.log" >&2
    exit 1
fi

# A refusal by size is one too.
cat >"$dir/schemathesis.toml" <<'TOML'
[checks.negative_data_rejection]
expected-statuses = [400, 401, 403, 404, 405, 406, 409, 412, 413, 414, 415, 422, 428]
TOML
checks=not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance
checks=$checks,response_schema_conformance,negative_data_rejection,unsupported_method,allow_header_conformance
checks=$checks,ignored_auth
status=0
# An event stream lasts for minutes by design.
# In the folder, so that nothing is written to the checkout.
(
    cd "$dir"
    exec timeout --foreground 240 "$venv/bin/schemathesis" --no-color run "$root/openapi/openapi.yaml" \
        --url "http://127.0.0.1:$port" --header "Authorization: Bearer $token" --checks "$checks" \
        --max-time "$seconds" --request-timeout 40 --continue-on-failure --no-shrink \
        --exclude-operation-id streamSagaEvents --generation-database none "$@" 8>&-
) || status=$?
if [ "$status" -ne 0 ]; then
    tail -n 50 "$dir/serve.log" >&2
fi
exit "$status"

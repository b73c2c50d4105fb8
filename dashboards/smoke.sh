#!/usr/bin/env bash
# Try the dashboards on your own Grafana (11 or later):
#
#   GRAFANA_URL=https://grafana.example GRAFANA_TOKEN=… dashboards/smoke.sh [DATA_SOURCE_UID]
#
# Imports the three dashboards (overwriting earlier imports), reads each back,
# compares its panels, and asks the data source, by default the first Prometheus
# it finds, whether it knows any gradwatch run. The token needs to be an Editor's.
# Without GRAFANA_TOKEN the request goes out without credentials.
set -euo pipefail

: "${GRAFANA_URL:?say where your Grafana is: GRAFANA_URL=http://127.0.0.1:3000}"
here=$(cd "$(dirname "$0")" && pwd)
url=${GRAFANA_URL%/}

credentials() { # as curl's configuration: on its command line, every user of the machine could read them
  [[ -z ${GRAFANA_TOKEN:-} ]] || printf 'header = "Authorization: Bearer %s"\n' "$GRAFANA_TOKEN"
}

ask() { # METHOD PATH [more of curl's options]
  curl --fail --silent --show-error --max-time 30 --config <(credentials) \
    -H 'Content-Type: application/json' -X "$1" "$url$2" "${@:3}"
}

failed=0
for file in "$here"/generated/*.json; do
  uid=$(basename "$file" .json)
  python3 -c 'import json, sys
print(json.dumps({"dashboard": json.load(open(sys.argv[1])), "overwrite": True, "message": "gradwatch smoke test"}))' \
    "$file" | ask POST /api/dashboards/db --data-binary @- >/dev/null
  if ask GET "/api/dashboards/uid/$uid" | python3 -c 'import json, sys
def told(dashboard):
    return [(panel["title"], [target["expr"] for target in panel.get("targets", [])]) for panel in dashboard["panels"]]
sys.exit(told(json.load(sys.stdin)["dashboard"]) != told(json.load(open(sys.argv[1]))))' "$file"; then
    echo "ok      $uid  $url/d/$uid"
  else
    echo "FAILED  $uid came back with other panels or queries" >&2
    failed=1
  fi
done

source=${1:-$(ask GET /api/datasources | python3 -c 'import json, sys
print(next((each["uid"] for each in json.load(sys.stdin) if each["type"] == "prometheus"), ""))')}
if [[ -z $source ]]; then
  echo "FAILED  no Prometheus data source" >&2
  exit 1
fi
runs=$(ask GET "/api/datasources/proxy/uid/$source/api/v1/query?query=count(gradwatch_run_info)" | python3 -c 'import json, sys
found = json.load(sys.stdin)["data"]["result"]
print(found[0]["value"][1] if found else 0)')
echo "data source $source shows $runs runs now"
exit "$failed"

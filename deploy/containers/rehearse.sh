#!/bin/sh
# Lays out a federation for a rehearsal: one person plays operator, researcher and institutions.
# For real each makes its own key, which never leaves it: docs/operator.md.
#
#   rehearse.sh ROOT HUB_HOST SITE...
#
# ROOT/SITE.jsonl is a site's private text. Makes ROOT/hub, ROOT/grace (operator), ROOT/ada
# (researcher) and ROOT/SITE, all of which must be empty. Where a hub is already, nothing happens.
set -eu
root=$1
host=$2
shift 2
if [ -e "$root/hub/coordinator.toml" ]; then
    echo "$root/hub is there already: nothing to lay out" >&2
    exit 0
fi

admit() { # NAME ROLE: sign the request that lies in ROOT/NAME
    cofuse coordinator sign "$root/hub" "$root/$1/request.csr" --role "$2" --name "$1" \
        > "$root/$1/certificate.pem"
    cp "$root"/hub/ca/*.pem "$root/$1/"
}

cofuse coordinator init "$root/hub" --host "$host" --host localhost \
    --listen 0.0.0.0:7443 --engine-listen 0.0.0.0:9443
cofuse identity "$root/grace" --role operator --name grace
admit grace operator
cofuse identity "$root/ada" --role researcher --name ada
admit ada researcher
for site in "$@"; do
    cofuse participant init "$root/$site" --name "$site" --coordinator "$host:7443" \
        --corpus "$root/$site.jsonl"
    admit "$site" participant
done

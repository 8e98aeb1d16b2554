#!/usr/bin/env bash
# Installs what is missing, lints, and runs the fast tests. Further arguments go to pytest:
#   bash scripts/test.sh                       everything that takes seconds
#   bash scripts/test.sh -m "slow or not slow" everything
#   bash scripts/test.sh -m st                 launchers and several processes only
#   bash scripts/test.sh tests/ut/data -k mask as pytest understands it
set -euo pipefail
exec </dev/null
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/environment.sh
source scripts/environment.sh

bash scripts/install.sh --arch "$(machine_arch)" --dev
PATH=$(cd "$(environment_dir "")" && pwd)/bin:$PATH
export PATH

status=0
ruff check . || status=$?
python -m pytest -m "not slow" "$@" || status=$?
exit "$status"

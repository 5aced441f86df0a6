#!/bin/bash
# Makes what deploy/tracking needs to be kept secret, once: one file each in a folder that is yours alone.
#
#   deploy/tracking/secrets.sh [FOLDER]       default: deploy/tracking/secrets
#
# The files can be read by all: containers read them as other users. The folder is what keeps people out.
set -euo pipefail
folder=${1:-$(dirname "$0")/secrets}
mkdir -p -m 0700 "$folder"
chmod 0700 "$folder"
umask 022
for name in postgres_password admin_password session_key s3_access_key s3_secret_key; do
    [ -s "$folder/$name" ] || python3 -c 'import secrets; print(secrets.token_hex(24), end="")' > "$folder/$name"
done
cat > "$folder/s3_identities" <<JSON
{"identities": [{"name": "mlflow", "actions": ["Admin", "Read", "Write", "List", "Tagging"],
  "credentials": [{"accessKey": "$(< "$folder/s3_access_key")", "secretKey": "$(< "$folder/s3_secret_key")"}]}]}
JSON
echo "secrets are in $folder; sign in as admin with: cat $folder/admin_password"

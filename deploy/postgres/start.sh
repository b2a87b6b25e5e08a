#!/bin/sh
# Start PostgreSQL so that it takes nothing but TLS and passwords: start.sh SERVER [ARGUMENT...]
# Reads TLS_CERTIFICATE, TLS_KEY and CONFIG (this folder). The key is copied, for the server refuses one that others can read.
set -eu
key="${KEY_FOLDER:-/var/run/postgresql}/postgres.key"
if [ "$(id -u)" = 0 ]; then install -o postgres -m 600 "$TLS_KEY" "$key"; else install -m 600 "$TLS_KEY" "$key"; fi
exec "$@" -c ssl=on -c ssl_cert_file="$TLS_CERTIFICATE" -c ssl_key_file="$key" -c ssl_min_protocol_version=TLSv1.2 \
    -c hba_file="$CONFIG/pg_hba.conf" -c password_encryption=scram-sha-256 \
    -c max_connections=200 -c log_connections=on -c log_disconnections=on

-- At the first start, run by psql as the superuser: the one role and the one database of the tracking servers.
\set ON_ERROR_STOP on
\set password `cat "$DB_PASSWORD_FILE"`
CREATE ROLE mlflow LOGIN PASSWORD :'password' NOSUPERUSER NOCREATEDB NOCREATEROLE;
CREATE DATABASE mlflow OWNER mlflow;
REVOKE ALL ON DATABASE mlflow FROM PUBLIC;
REVOKE CONNECT ON DATABASE postgres FROM PUBLIC;

"""Write MLflow's basic-auth configuration, and migrate the users' database before the server
starts.
"""

import configparser
import os
import subprocess
import sys

uri = os.environ["AUTH_DATABASE_URI"]
config = configparser.ConfigParser(interpolation=None)
config["mlflow"] = {
    "default_permission": os.environ["AUTH_DEFAULT_PERMISSION"],
    "database_uri": uri.replace("%", "%%"),  # the server's reader expands %
}
with open(
    os.open(os.environ["MLFLOW_AUTH_CONFIG_PATH"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600),
    "w",
) as file:
    config.write(file)
sys.exit(
    subprocess.run(
        [sys.executable, "-m", "mlflow.server.auth", "db", "upgrade", "--url", uri], check=False
    ).returncode
)

"""Call MLflow at each address; 401 is a success too, if it requires a password."""

import sys
import urllib.error
import urllib.request

for address in sys.argv[1:]:
    url = f"{address}/api/2.0/mlflow/experiments/search?max_results=1"
    try:
        with urllib.request.urlopen(url, timeout=20) as answer:
            status = answer.status
    except urllib.error.HTTPError as error:
        status = error.code
    print(status, url)
    if status not in (200, 401):
        sys.exit(f"{url}: found {status}, expected 200, or 401 where MLflow asks for a password")

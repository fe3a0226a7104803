"""`python -m framework.config` prints the JSON schema of a config, for editors."""

import json

from framework.config.schema import Config

if __name__ == "__main__":
    print(json.dumps(Config.model_json_schema(), indent=2))

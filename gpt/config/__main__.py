"""`python -m gpt.config` prints the JSON schema that editors use to complete and check the YAML."""

import sys

from gpt.config.loading import schema
from gpt.io.console import set_encoding

if __name__ == "__main__":
    set_encoding()
    sys.stdout.write(schema())

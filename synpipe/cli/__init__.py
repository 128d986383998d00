"""The command `synpipe`: everything that a user does without the Dagster UI.

- `commands`: the top-level command, which collects the others and prints errors
- `make`: `demo`, `materialize`, `status`, `gc`
- `dataset`: `dataset check`
- `search`: `search`, `link`
- `versions`: `versions`, `diff`, `rollback`, `forget`, `provenance`
- `encoders`: `finetune`, `pretrain`, `profile`
- `evaluation`: `compare`, `confusion`
- `export`: `export-annotations`, `export-site`
- `serve`: `ui`, `explore`
- `common`: options, JSON, errors, paths and pictures, shared by the commands

Each command imports the libraries that it needs when it runs, so that `--help` appears at once.
"""

from synpipe.cli.commands import main

__all__ = ["main"]

"""`python -m synpipe.cli` runs the same command as `synpipe`."""

from synpipe.cli import main

main(prog_name="synpipe")

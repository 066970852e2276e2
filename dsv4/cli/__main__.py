"""`python -m dsv4.cli`, the same as the `dsv4` command."""

from dsv4.cli.app import main

main()

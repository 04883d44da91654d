"""The command line: parse, one library call, render. The only place that prints or exits."""

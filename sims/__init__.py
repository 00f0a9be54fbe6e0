"""The user's shell: the command line, the engines and (with time) the paper reproductions."""

"""The command line: flags in, sentences out."""

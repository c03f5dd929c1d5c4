"""The verbs of the command line, one module each: SUMMARY, add_arguments(parser), run(args).

Their top level imports nothing heavy, so that `u4d --help` is instant.
"""

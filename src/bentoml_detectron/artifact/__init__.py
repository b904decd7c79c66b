"""A saved model on disk: writing its files and reading them. This package knows nothing of BentoML.

Reading always goes in one order: bound and check the bytes, parse them into inert data, decide, and only then build.
"""

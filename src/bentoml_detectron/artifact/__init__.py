"""What a saved model is on disk. Knows no BentoML.

Reading goes in this order and no other: bound and check the bytes, parse them into inert data, decide, and only then build.
"""

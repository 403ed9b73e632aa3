"""The commands of `pocketmoe`, by what they are for: each parses, calls, prints."""

"""The synthetic dataset: photos and titles of a made-up world, in MORE's released form."""

"""Types that data and models share: the batch layout, conversations, image and video settings."""

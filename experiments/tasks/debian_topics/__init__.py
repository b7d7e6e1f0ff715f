"""Problems with a checkable answer: the topic of a Debian package; see README.md."""

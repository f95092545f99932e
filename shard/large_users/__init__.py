"""Large users: an index of their own for each of the few whose exact search takes too long (ADR 0018).

| module | what is in it |
|---|---|
| `known` | which users have one, as the servers that search know it |
| `searching` | a search by it, and when an exact one is made instead |
| `plan` | who is to get one, and who to lose it: pure |
| `indexes` | making and dropping them |
| `recall` | how hard a search has to look for its recall, by measurement |
| `keeper` | all of that, in the background |
"""

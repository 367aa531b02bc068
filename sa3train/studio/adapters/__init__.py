"""The studio's Adapters page: the tools of `sa3train.adapters.tools` inside the studio's folders."""

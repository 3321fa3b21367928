"""When the regularisers work: by turns with the policy, or beside it; in this process or in others."""

complete -W "--help --version" patroni-agent-check

complete -c patroni-agent-check -l help

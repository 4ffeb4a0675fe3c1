# Made by tests/plain/manual.rs from the table in src/pools/options.rs.
_patroni_pools() {
    local cur=${COMP_WORDS[COMP_CWORD]}
    case ${COMP_WORDS[COMP_CWORD - 1]} in
        -f|--file) mapfile -t COMPREPLY < <(compgen -f -- "$cur") ;;
        --socket) mapfile -t COMPREPLY < <(compgen -f -- "$cur") ;;
        --wait) : ;;
        --metrics) mapfile -t COMPREPLY < <(compgen -f -- "$cur") ;;
        *) mapfile -t COMPREPLY < <(compgen -W '-f --file --agent --list --rules --socket --wait --quiet --metrics -h --help -V --version check status save-states' -- "$cur") ;;
    esac
}
complete -F _patroni_pools patroni-pools

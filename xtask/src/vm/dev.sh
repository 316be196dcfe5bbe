export SHUNT_BIN=/usr/local/bin/shunt SHUNT_ENVOY=/usr/local/bin/envoy
demo --stay /vm/pods &
demo=$!
while [ ! -e /vm/pods ] && kill -0 $demo 2>/dev/null; do sleep 1; done
cat >/vm/shell <<'END'
[ -e /vm/pods ] && . /vm/pods
cd /work
PS1='vm:\w# '
echo "
The agent runs, and two pods are enrolled. For example:
  shunt status
  client curl -s http://$SERVER/
  client curl -s http://$SERVICE/
  shunt explain --help
  client ss -tn
"
END
setsid cttyhack bash --rcfile /vm/shell
kill $demo
wait $demo

{{- /* The name of everything: that of the release, which usually is "shunt". */ -}}
{{- define "shunt.name" -}}
{{- if contains "shunt" .Release.Name }}{{ .Release.Name | trunc 63 | trimSuffix "-" }}
{{- else }}{{ printf "%s-shunt" .Release.Name | trunc 63 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "shunt.serviceAccount" -}}
{{ .Values.serviceAccount.name | default (include "shunt.name" .) }}
{{- end }}

{{- /* What selects the agent's pods. It cannot change in an upgrade. */ -}}
{{- define "shunt.selector" -}}
app.kubernetes.io/name: shunt
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "shunt.labels" -}}
{{ include "shunt.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/component: node-agent
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "shunt.image" -}}
{{- with .Values.image }}
{{- if .digest }}{{ .repository }}@{{ .digest }}
{{- else }}{{ .repository }}:{{ .tag | default $.Chart.AppVersion }}
{{- end }}
{{- end }}
{{- end }}

{{- /* "field", "annotation" or "none": how this cluster is told about AppArmor. */ -}}
{{- define "shunt.appArmor" -}}
{{- if ne .Values.appArmor "auto" }}{{ .Values.appArmor }}
{{- else if semverCompare ">=1.30.0-0" .Capabilities.KubeVersion.Version }}field
{{- else }}annotation
{{- end }}
{{- end }}
